"""Studies: several pipelines that differ in some settings, compared with intervals."""
