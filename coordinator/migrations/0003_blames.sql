-- Failures that are held against a node, JSON; null when there never were any.
ALTER TABLE nodes ADD COLUMN blames TEXT;
