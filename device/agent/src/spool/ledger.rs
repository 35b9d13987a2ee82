//! What the spool remembers beside its segments: which numbers the cloud has acknowledged.
//!
//! Losing the newest of it is harmless (a record is sent again and acknowledged again), except
//! before a segment is deleted, so the spool flushes it there.

use serde::{Deserialize, Serialize};

use super::ranges::RangeSet;

/// The state of one boot epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// Highest number that is known to be on disk or acknowledged.
    pub flagged: u32,
    /// The numbers that the cloud has acknowledged.
    pub acked: RangeSet,
}

/// Why a ledger does not answer, in words.
pub type LedgerError = String;

/// Where accounts are kept.
pub trait Ledger: Send {
    /// All accounts by epoch.
    fn load(&self) -> Result<Vec<(u32, Account)>, LedgerError>;
    /// Writes an account; it need not survive anything before [`Ledger::flush`].
    fn put(&mut self, epoch: u32, account: &Account) -> Result<(), LedgerError>;
    /// Forgets an account.
    fn remove(&mut self, epoch: u32) -> Result<(), LedgerError>;
    /// Makes everything written so far survive.
    fn flush(&mut self) -> Result<(), LedgerError>;
}
