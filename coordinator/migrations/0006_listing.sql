-- What a job's data in a store was when it was listed, JSON: written once.
ALTER TABLE jobs ADD COLUMN listing TEXT;
