//! The parameters of a source URI: each is taken once by the source that knows it, and whatever is
//! left over is an error, so that a misspelt parameter never goes unnoticed.

use std::collections::BTreeMap;
use std::str::FromStr;

use super::SourceError;

/// The parameters after the `?`.
pub(super) struct Query {
    uri: String,
    pairs: BTreeMap<String, String>,
    known: Vec<&'static str>,
}

impl Query {
    /// Splits `a=1&b=2`; a name without `=` is an error, and so is a name that stands twice.
    pub(super) fn parse(uri: &str, query: &str) -> Result<Self, SourceError> {
        let mut parsed = Self {
            uri: uri.to_owned(),
            pairs: BTreeMap::new(),
            known: Vec::new(),
        };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let Some((name, value)) = pair.split_once('=') else {
                return Err(parsed.refuse(pair, "", "a value: name=value"));
            };
            if parsed
                .pairs
                .insert(name.to_owned(), value.to_owned())
                .is_some()
            {
                return Err(parsed.refuse(name, value, "each parameter only once"));
            }
        }
        Ok(parsed)
    }

    /// Takes a parameter as text.
    pub(super) fn text(&mut self, name: &'static str) -> Option<String> {
        self.known.push(name);
        self.pairs.remove(name)
    }

    /// Takes a parameter and parses it; `default` where it is absent.
    pub(super) fn value<T: FromStr>(
        &mut self,
        name: &'static str,
        default: T,
        expected: &str,
    ) -> Result<T, SourceError> {
        match self.text(name) {
            None => Ok(default),
            Some(text) => text.parse().map_err(|_| self.refuse(name, &text, expected)),
        }
    }

    /// Takes a parameter that is one of a few words; the first is the default.
    pub(super) fn choice<T: Copy, const N: usize>(
        &mut self,
        name: &'static str,
        choices: [(&'static str, T); N],
    ) -> Result<T, SourceError> {
        let text = self.text(name).unwrap_or_else(|| choices[0].0.to_owned());
        match choices.iter().find(|(word, _)| *word == text) {
            Some((_, choice)) => Ok(*choice),
            None => {
                let words = choices.map(|(word, _)| word).join(" or ");
                Err(self.refuse(name, &text, &words))
            }
        }
    }

    /// The error for a parameter whose value won't do.
    pub(super) fn refuse(&self, name: &str, value: &str, expected: &str) -> SourceError {
        SourceError::Value {
            uri: self.uri.clone(),
            name: name.to_owned(),
            value: value.to_owned(),
            expected: expected.to_owned(),
        }
    }

    /// Refuses what nobody took.
    pub(super) fn finish(mut self) -> Result<(), SourceError> {
        match self.pairs.pop_first() {
            None => Ok(()),
            Some((name, _)) => {
                self.known.sort_unstable();
                Err(SourceError::UnknownParameter {
                    uri: self.uri,
                    name,
                    known: self.known,
                })
            }
        }
    }

    /// The URI, for errors.
    pub(super) fn uri(&self) -> &str {
        &self.uri
    }
}
