"""The commands, by subject. Each makes one call of ``Client``, and shows what came back."""
