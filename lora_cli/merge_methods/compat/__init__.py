"""What PEFT makes of A and B apart, so that results obtained with it can be had again."""
