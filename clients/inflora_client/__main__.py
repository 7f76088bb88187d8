"""``python -m inflora_client`` is the ``inflora`` command."""

from inflora_client.cli import main

if __name__ == "__main__":
    main()
