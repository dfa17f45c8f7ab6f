"""The contract: schema, states, tables, the only SQL, dispatch, settings, errors. Imports nothing else of ours."""
