//! From a round that ends in a difference to the few commands that it takes.

use super::{Batch, Outcome, Plan, play, shown};

/// Each is a short round; a difference that needs more of them is shown as it is.
const REPLAYS_MAX: usize = 1_500;

/// Leaves out whatever the difference does not need; also gives the difference that is left.
pub(super) fn shrink(plan: &Plan, mut batches: Vec<Batch>) -> anyhow::Result<(Vec<Batch>, String)> {
    let mut replays = 0;
    let mut differs = |batches: &[Batch]| -> anyhow::Result<Option<String>> {
        replays += 1;
        if replays > REPLAYS_MAX {
            return Ok(None);
        }
        play(plan, batches, &mut Outcome::default())
    };
    let Some(mut difference) = differs(&batches)? else {
        return Ok((batches, "it did not come again\n".to_owned()));
    };
    let mut size = count(&batches);
    while size > 0 {
        let mut at = 0;
        while at < count(&batches) {
            let fewer = without(&batches, at, size);
            match differs(&fewer)? {
                Some(still) => (batches, difference) = (fewer, still),
                None => at += size,
            }
        }
        size /= 2;
    }
    Ok((batches, difference))
}

fn count(batches: &[Batch]) -> usize {
    batches.iter().map(|batch| batch.steps.len()).sum()
}

fn without(batches: &[Batch], first: usize, size: usize) -> Vec<Batch> {
    let mut number = 0;
    let mut fewer = Vec::new();
    for batch in batches {
        let kept = batch.steps.iter().filter(|_| {
            number += 1;
            number <= first || number > first + size
        });
        let steps: Vec<_> = kept.cloned().collect();
        if !steps.is_empty() {
            let protocol = batch.protocol;
            fewer.push(Batch { protocol, steps });
        }
    }
    fewer
}

/// What is to be sent; one line for what is sent at once.
pub(super) fn story(batches: &[Batch]) -> String {
    let lines = batches.iter().map(|batch| {
        let steps: Vec<_> = batch.steps.iter().map(shown).collect();
        format!("    RESP{}: {}", batch.protocol + 2, steps.join(" | "))
    });
    lines.collect::<Vec<_>>().join("\n")
}
