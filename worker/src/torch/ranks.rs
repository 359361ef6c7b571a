//! The ranks that train together, as one rank sees them, and what they decide outside of a step.

use std::sync::Arc;

use tch::Tensor;

use super::TrainError;
use super::c10d::Group;

/// The group of all ranks.
#[derive(Clone)]
pub struct Ranks {
    /// `None` for a single rank.
    pub group: Option<Arc<Group>>,
}

impl Ranks {
    /// Whether the group still stands, after a step's reductions were waited for.
    pub fn check(&self) -> Result<(), TrainError> {
        self.group.as_ref().map_or(Ok(()), |group| Ok(group.check()?))
    }

    /// The sum of each number over all ranks. All of them must ask, and none may be in a step.
    pub fn sum(&self, numbers: &[f64]) -> Result<Vec<f64>, TrainError> {
        let Some(group) = &self.group else { return Ok(numbers.to_vec()) };
        let tensor = Tensor::f_from_slice(numbers)?;
        group.all_reduce(&tensor)?;
        let mut sums = vec![0.0; numbers.len()];
        tensor.f_copy_data(&mut sums, numbers.len())?;
        Ok(sums)
    }
}
