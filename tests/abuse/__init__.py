"""What strangers, broken disks and bad luck hand in, by kind: each case failed once. Add the next one to its kind.

test_documents: revocations, channels, tags and signatures that say more than their key may say.
test_activation: a step of a trusted activation that fails, for everyone who activates.
test_settings: policies, switches and secret files that cannot be read as meant.
test_files: paths that are no files, files that do not end, folders that cannot be written.
test_audit: what is written down, whatever happens.
"""
