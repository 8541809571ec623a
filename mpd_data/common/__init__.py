"""Ground floor: errors, files, options, text, models. Everything may import it."""
