"""Prompt files, and the fields of a prompt."""

from ddinfer.prompts.files import read_requests as read_requests
