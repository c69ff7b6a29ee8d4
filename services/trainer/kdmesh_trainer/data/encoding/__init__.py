"""Chats and texts made into token ids."""
