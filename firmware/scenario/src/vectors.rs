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

/// The trust root, signed by itself; a [`flywheel_shared::trust::Signed`] in postcard.
pub const ROOT: &[u8] = include_bytes!("../vectors/root.bin");
/// The signed manifest, in the same form.
pub const MANIFEST: &[u8] = include_bytes!("../vectors/manifest.bin");
/// The signed offer, in the same form.
pub const OFFER: &[u8] = include_bytes!("../vectors/offer.bin");
/// The manifest's score parameters.
pub const SCORES: &[u8] = include_bytes!("../vectors/scores.bin");
/// The manifest's golden inputs, a [`flywheel_shared::spec::Golden`] in postcard.
pub const GOLDEN: &[u8] = include_bytes!("../vectors/golden.bin");
