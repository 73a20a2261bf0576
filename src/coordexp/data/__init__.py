"""Records, scenes, importers, and what turns a record into model inputs. Import the modules, not this package."""
