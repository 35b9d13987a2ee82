//! Class names: typed by people and carried in manifests, pictures' paths and reports, so their
//! rules stand in one place.

use thiserror::Error;

/// The longest class name, in characters.
pub const MAX_CLASS_CHARS: usize = 40;

/// Why a text is no class name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ClassNameError {
    /// Nothing but white space.
    #[error("the class name is empty; give a short name such as `stop`")]
    Empty,
    /// More than [`MAX_CLASS_CHARS`] characters.
    #[error("the class name has {chars} characters; use at most {MAX_CLASS_CHARS}")]
    Long {
        /// Its length in characters.
        chars: usize,
    },
    /// A line break, tab or other control character.
    #[error("the class name {name:?} holds a control character; use one line of plain text")]
    Control {
        /// The name, as given.
        name: String,
    },
}

/// The class name in `text`, white space at both ends removed.
///
/// # Errors
/// [`ClassNameError`] when nothing is left, it is too long, or it holds a control character.
pub fn class_name(text: &str) -> Result<&str, ClassNameError> {
    let name = text.trim();
    if name.is_empty() {
        return Err(ClassNameError::Empty);
    }
    let chars = name.chars().count();
    if chars > MAX_CLASS_CHARS {
        return Err(ClassNameError::Long { chars });
    }
    if name.chars().any(char::is_control) {
        return Err(ClassNameError::Control {
            name: name.to_owned(),
        });
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_trimmed_and_bounded() {
        assert_eq!(class_name("  speed 30 "), Ok("speed 30"));
        assert_eq!(class_name(" \n"), Err(ClassNameError::Empty));
        assert!(matches!(
            class_name("a\nb"),
            Err(ClassNameError::Control { .. })
        ));
        assert_eq!(class_name(&"ü".repeat(40)).map(str::len), Ok(80));
        assert_eq!(
            class_name(&"x".repeat(41)),
            Err(ClassNameError::Long { chars: 41 })
        );
    }
}
