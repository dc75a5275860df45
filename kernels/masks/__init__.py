"""Reading masks: per-row bounds and host flags from key validity or from an explicit mask."""
