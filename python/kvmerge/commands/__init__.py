"""The sub-commands of ``kvmerge``, one module each, imported when one is used."""
