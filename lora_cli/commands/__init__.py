"""What the user types: each command parses, calls one step and shows what came back."""
