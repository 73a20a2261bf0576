"""The ms-swift plugin; ``coordexp/integrations/swift.py`` is the file that ms-swift imports."""
