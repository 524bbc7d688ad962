"""The LIBERO simulator: importing it, its task suites, its environments, and an expert that acts in them."""
