#!/usr/lib/storaged/venv/bin/python3 -I
import sys

from storaged.__main__ import main

sys.exit(main())
