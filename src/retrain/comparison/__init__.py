"""What differs between two runs or configurations, and what one step of a run did. Reads files only; no torch."""
