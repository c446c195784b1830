//! How a key of the config is classified: at its field.
//!
//! [`settings!`] declares a section. A key that means something here is an ordinary field, with its default beside it; a
//! key under `older` is a spelling of an earlier release of Levanter, read into today's key with a note; a key under
//! `ignored` is known to Levanter and changes nothing here: it is accepted, and listed once. What is none of them is an
//! error.

use serde::de::{Deserialize, Deserializer, IgnoredAny};

/// A key that changes nothing here. The reader is told of it as of anything that is skipped (crate `serde_ignored`).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Ignored;

impl<'de> Deserialize<'de> for Ignored {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(deserializer).map(|_| Self)
    }
}

/// An older spelling: what the file says under it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Older<T>(Option<T>);

impl<T> Default for Older<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Older<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Option::deserialize(deserializer).map(Self)
    }
}

impl<T> Older<T> {
    /// Takes what the file says, with a note that names the spelling, and today's.
    pub(super) fn take(&mut self, key: &str, today: &str, notes: &mut Vec<String>) -> Option<T> {
        let value = self.0.take()?;
        notes.push(format!("{key} is an older spelling: it is read as {today}"));
        Some(value)
    }
}

/// Declares a section of the config: see the module's documentation. Generates the struct, its `Default`, its reader and
/// writer of YAML, and its flags.
macro_rules! settings {
    (
        $(#[$meta:meta])*
        pub struct $name:ident {
            $($(#[$key_meta:meta])* $vis:vis $key:ident: $ty:ty = $default:expr,)*
        }
        $(older { $($(#[$older_meta:meta])* $older:ident: $older_ty:ty,)* })?
        $(ignored { $($ignored:ident),* $(,)? })?
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, clap::Args)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name {
            $($(#[$key_meta])* $vis $key: $ty,)*
            $($(
                $(#[$older_meta])*
                #[arg(skip)]
                #[serde(skip_serializing)]
                pub(in crate::config) $older: $crate::config::key::Older<$older_ty>,
            )*)?
            $($(
                #[arg(skip)]
                #[serde(skip_serializing)]
                pub(in crate::config) $ignored: $crate::config::key::Ignored,
            )*)?
        }

        impl Default for $name {
            fn default() -> Self {
                Self {
                    $($key: $default,)*
                    $($($older: Default::default(),)*)?
                    $($($ignored: Default::default(),)*)?
                }
            }
        }
    };
}

pub(super) use settings;
