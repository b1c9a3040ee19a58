"""The native libraries: where they are, what they can, what they say."""
