"""Chats: from messages to a prompt, and from an answer to the form it is wanted in."""
