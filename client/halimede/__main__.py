"""`python -m halimede` is the command `halimede`."""

from halimede.cli import main

if __name__ == "__main__":
    main()
