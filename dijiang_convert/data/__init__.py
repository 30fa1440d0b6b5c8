"""Reads texts, chats and images, and makes rows of tokens, or pixels, of them. No model is loaded here."""
