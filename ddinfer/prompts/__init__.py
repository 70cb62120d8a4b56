"""Prompt files, and what a prompt may say."""

from ddinfer.prompts.files import read_requests as read_requests
