//! Bytes as a cloud would send them, made by `firmware-host vectors` and committed.

/// The device that the offer is for.
pub const DEVICE: &str = "cam1";
/// Its hardware class.
pub const HARDWARE: &str = "cortexm7";
/// Sequence of the offered model.
pub const SEQUENCE: u64 = 7;
/// When the model was made, Unix milliseconds.
pub const MADE_MS: u64 = 1_760_000_000_000;
/// Until when offer and model are good, Unix milliseconds.
pub const UNTIL_MS: u64 = MADE_MS + 3_600_000;

/// When all of it was signed, Unix milliseconds.
pub const SIGNED_MS: u64 = MADE_MS - 60_000;

/// The trust root that the device is enrolled with, signed by two of three root keys; a
/// [`flywheel_shared::trust::SignedRoot`] in postcard.
pub const ROOT: &[u8] = include_bytes!("../vectors/root.bin");
/// The next one, which names another rollout key, in the same form.
pub const ROOT2: &[u8] = include_bytes!("../vectors/root2.bin");
/// The signed manifest, a [`flywheel_shared::trust::Signed`] in postcard.
pub const MANIFEST: &[u8] = include_bytes!("../vectors/manifest.bin");
/// The offer, signed by the rollout key of the second root, in the same form.
pub const OFFER: &[u8] = include_bytes!("../vectors/offer.bin");
/// What the time stamp answers.
pub const NONCE: u64 = 1;
/// A time stamp of [`MADE_MS`], signed by the rollout key of the second root, in the same form.
pub const TIME: &[u8] = include_bytes!("../vectors/time.bin");
/// The manifest's score parameters.
pub const SCORES: &[u8] = include_bytes!("../vectors/scores.bin");
/// The manifest's golden inputs, a [`flywheel_shared::spec::Golden`] in postcard.
pub const GOLDEN: &[u8] = include_bytes!("../vectors/golden.bin");
