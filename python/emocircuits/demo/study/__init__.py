"""Whether VEENA's two halves do on the embedded model what random heads and neurons do not (docs/embedded-study.md)."""
