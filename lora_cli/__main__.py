"""`python -m lora_cli` is `lora`."""

from lora_cli.app import main

main()
