"""The sentence: schedule, plan, draft, forward, verify, commit, stream."""
