//! Who may say what: roles, signed bodies and the checks a device makes before it believes one.
//!
//! Roles after TUF (theupdateframework.io) and Uptane: *root* names the other keys, *release* signs
//! model manifests and is kept off the server, *rollout* is online and signs short-lived offers and
//! the time, each for one device, *device* signs what a device uploads. A signature covers a domain
//! prefix (role and format version) and the digest of the raw body, so that an offer never passes as
//! a manifest. Bodies are verified before they are decoded, and decode only from their single
//! canonical spelling. `TRUST.md` beside this crate has the layouts, the numbers of the errors and
//! what to do when a key is lost or stolen.

mod error;
mod floor;
mod manifest;
mod offer;
mod root;
mod signature;
mod time;

pub use error::TrustError;
pub use floor::{Floor, KeyId};
pub use manifest::{
    ANY_HARDWARE, Delta, Intake, MAX_DELTAS, MAX_PARTS, Manifest, Part, PartKind, RUNTIME_ABI,
    TrialBounds, check_base, check_part,
};
pub use offer::{Accepted, Judge, Offer};
pub use root::{
    Keys, MAX_ROOT, MAX_ROOT_KEYS, MAX_ROOT_SIGNATURES, ROOT_SIGNATURE, SignedRoot, TrustRoot,
};
pub use signature::{
    MAX_BODY, PublicKey, Role, Signed, Verified, batch_digest, check, sign, sign_digest, strong,
    verify,
};
pub use time::{TimeStamp, Timekeeper};

#[cfg(test)]
mod tests;
