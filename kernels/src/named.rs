//! Arguments by name: the one table that every form of a kernel, its reference, the command line and `.npy` inputs share.
//!
//! A kernel states its arguments once ([`Argument`]: name, type, role, and whether this problem has it). Arrays, tensors of
//! a program and types are then looked up by name ([`Named`]), never by position: an optional argument that is absent
//! shifts nothing.

use std::fmt;
use std::ops::Index;

use pagoda_ir::{HostTensor, TensorType};

/// How a kernel takes an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Scalars that a TPU kernel reads from SMEM before its grid starts, and that index transforms may use.
    Prefetch,
    /// An array that is read.
    Input,
    /// An array whose memory becomes that of a result.
    Donated {
        /// The result's index.
        result: usize,
    },
}

/// One argument of a problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argument {
    /// Its name, unique among the problem's arguments.
    pub name: &'static str,
    /// Element type and sizes.
    pub ty: TensorType,
    /// How it is taken.
    pub role: Role,
    present: bool,
}

impl Argument {
    /// Scalars that are prefetched into SMEM.
    pub const fn prefetch(name: &'static str, ty: TensorType) -> Self {
        Self { name, ty, role: Role::Prefetch, present: true }
    }

    /// An array that is read.
    pub const fn input(name: &'static str, ty: TensorType) -> Self {
        Self { name, ty, role: Role::Input, present: true }
    }

    /// An array whose memory becomes that of result `result`.
    pub const fn donated(name: &'static str, ty: TensorType, result: usize) -> Self {
        Self { name, ty, role: Role::Donated { result }, present: true }
    }

    /// The argument exists only if `condition` holds.
    #[must_use]
    pub fn when(self, condition: bool) -> Self {
        Self { present: self.present && condition, ..self }
    }
}

/// The arguments that a problem has, in the order in which a module's `main` takes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments(Vec<Argument>);

impl Arguments {
    /// Those of `table` that are present.
    pub fn new(table: impl IntoIterator<Item = Argument>) -> Self {
        Self(table.into_iter().filter(|argument| argument.present).collect())
    }

    /// The arguments in order.
    pub fn iter(&self) -> impl Iterator<Item = &Argument> {
        self.0.iter()
    }

    /// Their types in order.
    pub fn types(&self) -> Vec<TensorType> {
        self.0.iter().map(|argument| argument.ty.clone()).collect()
    }

    /// The argument called `name`.
    pub fn get(&self, name: &str) -> Option<&Argument> {
        self.0.iter().find(|argument| argument.name == name)
    }

    /// Gives `values`, one per argument in order, the arguments' names.
    ///
    /// # Panics
    /// When there is not one value per argument.
    pub fn name<T>(&self, values: impl IntoIterator<Item = T>) -> Named<T> {
        let values: Vec<T> = values.into_iter().collect();
        assert_eq!(values.len(), self.0.len(), "one value per argument");
        self.0.iter().map(|argument| argument.name).zip(values).collect()
    }
}

impl fmt::Display for Arguments {
    /// `x bf16[8,16], w bf16[16,24]`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Argument { name, ty, .. }) in self.0.iter().enumerate() {
            write!(f, "{}{name} {ty}", if index == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

/// Values by name, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named<T>(Vec<(&'static str, T)>);

impl<T> Named<T> {
    /// The value called `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<&T> {
        self.0.iter().find(|(known, _)| *known == name).map(|(_, value)| value)
    }

    /// As [`Named::get`], to be changed.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut T> {
        self.0.iter_mut().find(|(known, _)| *known == name).map(|(_, value)| value)
    }

    /// Names and values, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &T)> {
        self.0.iter().map(|(name, value)| (*name, value))
    }

    /// The values, in order.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|(_, value)| value)
    }

    /// The values with `name` set to `value`: in its place, or behind the others.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: T) -> Self {
        match self.get_mut(name) {
            Some(old) => *old = value,
            None => self.0.push((name, value)),
        }
        self
    }
}

impl<T> FromIterator<(&'static str, T)> for Named<T> {
    fn from_iter<I: IntoIterator<Item = (&'static str, T)>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}

impl<T> Index<&str> for Named<T> {
    type Output = T;

    /// # Panics
    /// When there is no value of that name: a kernel asks only for arguments of its own table.
    fn index(&self, name: &str) -> &T {
        self.get(name).unwrap_or_else(|| panic!("`{name}` is not an argument of this problem"))
    }
}

/// Host arrays by argument name: the inputs of one launch.
pub type Arrays = Named<HostTensor>;
