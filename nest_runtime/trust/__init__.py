"""Who may publish what: keys, signatures, policies, revocations, and the check before every activation."""
