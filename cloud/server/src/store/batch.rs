//! Changes to records and event streams that are made together or not at all.

use serde::{Deserialize, Serialize};

use super::StoreError;
use super::log::MAX_ENTRY;

/// Several puts, deletes and events; see [`super::Store::write`].
#[derive(Clone, Debug, Default)]
pub struct Batch {
    changes: Vec<Change>,
}

/// One change, as it stands in the log. Variants are numbered by order: append only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Change {
    /// 0.
    Put {
        tree: String,
        key: Vec<u8>,
        value: Vec<u8>,
    },
    /// 1.
    Delete { tree: String, key: Vec<u8> },
    /// 2.
    Event {
        stream: String,
        /// Given by the committer before the change is logged, so that applying it twice changes
        /// nothing.
        number: u64,
        value: Vec<u8>,
    },
}

impl Change {
    /// About its length in the log.
    fn len(&self) -> usize {
        match self {
            Self::Put { tree, key, value } => tree.len() + key.len() + value.len(),
            Self::Delete { tree, key } => tree.len() + key.len(),
            Self::Event { stream, value, .. } => stream.len() + value.len(),
        }
    }
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
            number: 0,
            value: json(stream, event)?,
        });
        Ok(self)
    }

    pub(super) fn changes(&self) -> &[Change] {
        &self.changes
    }

    pub(super) fn changes_mut(&mut self) -> &mut [Change] {
        &mut self.changes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// About its length in the log.
    pub(super) fn len(&self) -> usize {
        self.changes.iter().map(|change| change.len() + 16).sum()
    }

    /// Whether it fits one entry of the log, which is what makes it happen all or not at all.
    pub(super) fn fits(&self) -> Result<(), StoreError> {
        if self.len() < MAX_ENTRY {
            return Ok(());
        }
        let named = self.changes.first().map(|change| match change {
            Change::Put { tree, .. } | Change::Delete { tree, .. } => tree.as_str(),
            Change::Event { stream, .. } => stream.as_str(),
        });
        Err(StoreError::Record {
            tree: named.unwrap_or_default().to_owned(),
            why: format!("the changes exceed {MAX_ENTRY} bytes; make fewer at a time"),
        })
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
