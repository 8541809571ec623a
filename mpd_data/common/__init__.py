"""What every other room uses: errors, files, options, text, models, the machine."""
