"""Files of prompts: their lines as requests, answered here or by many machines."""
