//! Ops whose bodies run or not, and the barrier that keeps the compiler from moving ops past it.

use super::{
    Builder, Tensor,
    emit::{Captures, ensure, types},
};
use crate::{element::Element, error::Result, shape::TensorType};

/// One branch of a [`Builder::case`].
pub type Branch<'b, 'c, 'a> = Box<dyn FnOnce(&Builder<'c, 'a>) -> Result<Vec<Tensor<'c, 'a>>> + 'b>;

impl<'c, 'a> Builder<'c, 'a> {
    /// Repeats `next` while `condition` (a scalar pred) holds; both get the loop's values, which begin as `inits` and
    /// keep their types.
    pub fn while_(
        &self,
        inits: &[Tensor<'c, 'a>],
        condition: impl FnOnce(&Builder<'c, 'a>, &[Tensor<'c, 'a>]) -> Result<Tensor<'c, 'a>>,
        next: impl FnOnce(&Builder<'c, 'a>, &[Tensor<'c, 'a>]) -> Result<Vec<Tensor<'c, 'a>>>,
    ) -> Result<Vec<Tensor<'c, 'a>>> {
        let op = "while";
        let carried: Vec<_> = inits.iter().map(|init| init.ty()).collect();
        let condition = self.body(op, Captures::Allowed, &carried, |b, args| Ok(vec![condition(b, args)?]))?;
        ensure(condition.results == [TensorType::scalar(Element::Pred)], op, || {
            format!("the condition returns {} and must return pred[]", types(&condition.results))
        })?;
        let next = self.body(op, Captures::Allowed, &carried, next)?;
        ensure(next.results == carried, op, || {
            format!("the body returns ({}) and must return ({})", types(&next.results), types(&carried))
        })?;
        self.emit_all(op, inits, &[], &carried, vec![condition, next])
    }

    /// What `on_true` returns when the scalar `pred` holds, else what `on_false` returns; only that branch runs.
    pub fn if_(
        &self,
        pred: Tensor<'c, 'a>,
        on_true: impl FnOnce(&Builder<'c, 'a>) -> Result<Vec<Tensor<'c, 'a>>>,
        on_false: impl FnOnce(&Builder<'c, 'a>) -> Result<Vec<Tensor<'c, 'a>>>,
    ) -> Result<Vec<Tensor<'c, 'a>>> {
        let op = "if";
        let ty = pred.ty();
        ensure(ty == TensorType::scalar(Element::Pred), op, || format!("the condition is {ty} and must be pred[]"))?;
        let on_true = self.body(op, Captures::Allowed, &[], |b, _| on_true(b))?;
        let on_false = self.body(op, Captures::Allowed, &[], |b, _| on_false(b))?;
        ensure(on_true.results == on_false.results, op, || {
            format!("branches differ: true ({}), false ({})", types(&on_true.results), types(&on_false.results))
        })?;
        let results = on_true.results.clone();
        self.emit_all(op, &[pred], &[], &results, vec![on_true, on_false])
    }

    /// What branch number `index` (`i32[]`) returns; the last one when there is no such branch. Only that branch runs.
    pub fn case(&self, index: Tensor<'c, 'a>, branches: Vec<Branch<'_, 'c, 'a>>) -> Result<Vec<Tensor<'c, 'a>>> {
        let op = "case";
        let ty = index.ty();
        ensure(ty == TensorType::scalar(Element::I32), op, || format!("the index is {ty} and must be i32[]"))?;
        ensure(!branches.is_empty(), op, || "needs one branch at least".to_owned())?;
        let mut bodies = Vec::with_capacity(branches.len());
        for branch in branches {
            bodies.push(self.body(op, Captures::Allowed, &[], |b, _| branch(b))?);
        }
        let results = bodies[0].results.clone();
        for (number, body) in bodies.iter().enumerate() {
            ensure(body.results == results, op, || {
                format!("branches differ: 0 ({}), {number} ({})", types(&results), types(&body.results))
            })?;
        }
        self.emit_all(op, &[index], &[], &results, bodies)
    }

    /// The operands, none of which is used before all of them are computed.
    pub fn optimization_barrier(&self, operands: &[Tensor<'c, 'a>]) -> Result<Vec<Tensor<'c, 'a>>> {
        let results: Vec<_> = operands.iter().map(|operand| operand.ty()).collect();
        self.emit_all("optimization_barrier", operands, &[], &results, Vec::new())
    }
}
