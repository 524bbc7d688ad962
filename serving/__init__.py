"""Speaking with robots and with other policies: openpi's websocket protocol, served and asked."""

API_KEY = "STATEVLA_API_KEY"  # the environment variable: what stands in a command is read by every user of a machine
