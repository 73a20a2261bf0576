"""Importers: other annotation formats to record files, one module a format."""
