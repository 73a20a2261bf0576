"""The ms-swift plugin: ``swift sft --external_plugins .../coordexp/integrations/swift.py --loss_type coordexp``.

The objective comes from the YAML that the variable ``COORDEXP_CONFIG`` names; docs/recipes.md has the commands.
"""

from __future__ import annotations

import os
import sys

from coordexp.integrations.ms_swift.register import register

# ms-swift puts the folder of a plugin first on the path, where this file would be found in the place of ms-swift itself.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != _HERE]

register()
