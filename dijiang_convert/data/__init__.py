"""Texts, chats and images in, rows of tokens out."""
