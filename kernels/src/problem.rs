//! A valid problem: what a kernel is asked to do, in one serializable struct whose limits were checked.

use std::fmt;
use std::ops::Deref;

use serde::{Serialize, de::DeserializeOwned};

use crate::error::Invalid;

/// The description of a problem: plain data, written to the first line of emitted texts, to records and to the command
/// line. It may be invalid; [`Problem::new`] checks it.
pub trait Specification: Clone + fmt::Debug + PartialEq + Serialize + DeserializeOwned + Send + Sync + 'static {
    /// Checks every limit.
    ///
    /// # Errors
    /// The first field that breaks a limit.
    fn validate(&self) -> Result<(), Invalid>;
}

/// A valid problem. Its fields are read through the specification, to which it dereferences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem<S>(S);

impl<S: Specification> Problem<S> {
    /// Validates `spec`.
    ///
    /// # Errors
    /// The first field that breaks a limit.
    pub fn new(spec: S) -> Result<Self, Invalid> {
        spec.validate()?;
        Ok(Self(spec))
    }

    /// The description that it was made of.
    pub fn spec(&self) -> &S {
        &self.0
    }
}

impl<S> Deref for Problem<S> {
    type Target = S;

    fn deref(&self) -> &S {
        &self.0
    }
}
