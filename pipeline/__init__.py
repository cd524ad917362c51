"""The stages as plain functions: configuration in, result out. Never prints."""
