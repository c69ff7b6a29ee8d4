"""Chats in rows of files, and the templates that render them."""
