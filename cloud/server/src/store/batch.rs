//! Changes to records and event streams that are made together or not at all.

use serde::Serialize;

use super::StoreError;

/// Several puts, deletes and events; see [`super::Store::write`].
#[derive(Clone, Debug, Default)]
pub struct Batch {
    changes: Vec<Change>,
}

/// One change.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Put {
        tree: String,
        key: Vec<u8>,
        value: Vec<u8>,
    },
    Delete {
        tree: String,
        key: Vec<u8>,
    },
    Event {
        stream: String,
        value: Vec<u8>,
    },
}

impl Batch {
    /// No changes yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes a record, replacing what stands under the key.
    pub fn put<T: Serialize + ?Sized>(
        &mut self,
        tree: &str,
        key: &[u8],
        value: &T,
    ) -> Result<&mut Self, StoreError> {
        self.changes.push(Change::Put {
            tree: checked(tree)?,
            key: key.to_vec(),
            value: json(tree, value)?,
        });
        Ok(self)
    }

    /// Removes a record; removing one that is not there is no error.
    pub fn delete(&mut self, tree: &str, key: &[u8]) -> Result<&mut Self, StoreError> {
        self.changes.push(Change::Delete {
            tree: checked(tree)?,
            key: key.to_vec(),
        });
        Ok(self)
    }

    /// Appends an event to a stream.
    pub fn event<T: Serialize + ?Sized>(
        &mut self,
        stream: &str,
        event: &T,
    ) -> Result<&mut Self, StoreError> {
        self.changes.push(Change::Event {
            stream: checked(stream)?,
            value: json(stream, event)?,
        });
        Ok(self)
    }

    pub(super) fn changes(&self) -> &[Change] {
        &self.changes
    }
}

fn json<T: Serialize + ?Sized>(tree: &str, value: &T) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(value).map_err(|error| StoreError::record(tree, &error))
}

fn checked(name: &str) -> Result<String, StoreError> {
    if name.contains('\0') {
        return Err(StoreError::Record {
            tree: name.escape_default().to_string(),
            why: "names hold no zero character".to_owned(),
        });
    }
    Ok(name.to_owned())
}
