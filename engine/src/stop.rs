//! When a sample ends: an end-of-sequence token, the stop sequence, or its budget of new tokens.
//!
//! What is kept follows vLLM: `tokens` are all tokens sampled up to and including the one that ended the sample; the
//! text leaves out the end-of-sequence token and the stop sequence. The stop sequence is matched as tokens, like
//! Levanter's: the text `.` stops at the token of `.`, not inside a longer token that contains a full stop. Only sampled
//! tokens are matched, never the prompt.

/// Why a sample ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// An end-of-sequence token or the stop sequence.
    Stop,
    /// The budget of new tokens is used up.
    Length,
    /// The caller cancelled it; a run that goes on makes it anew.
    Cancelled,
}

/// Where a sample ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Tokens kept, the stopping one included.
    pub tokens: usize,
    /// Of these, how many belong to the text.
    pub text_tokens: usize,
    /// Why.
    pub reason: FinishReason,
}

/// What ends a sample besides its budget.
#[derive(Clone, Debug, Default)]
pub struct StopRule {
    eos: Vec<u32>,
    sequences: Vec<Vec<u32>>,
}

impl StopRule {
    /// Stops at any of the `eos` tokens and at any of the (tokenised) `sequences`; an empty sequence never matches.
    pub fn new(eos: impl Into<Vec<u32>>, mut sequences: Vec<Vec<u32>>) -> Self {
        sequences.retain(|sequence| !sequence.is_empty());
        Self { eos: eos.into(), sequences }
    }

    /// The end-of-sequence tokens.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// The first end within `sampled` (all new tokens of one sample), looking at tokens from `from` on.
    ///
    /// Tokens after the end are what the device sampled before the host looked; they are not part of the sample.
    pub fn end(&self, sampled: &[u32], from: usize, max_new_tokens: usize) -> Option<End> {
        (from..sampled.len()).find_map(|last| {
            let kept = &sampled[..=last];
            let stop_length = if self.eos.contains(&sampled[last]) {
                Some(1)
            } else {
                self.sequences.iter().filter(|sequence| kept.ends_with(sequence)).map(Vec::len).max()
            };
            let end = |text_tokens, reason| End { tokens: kept.len(), text_tokens, reason };
            match stop_length {
                Some(length) => Some(end(kept.len() - length, FinishReason::Stop)),
                None => (kept.len() >= max_new_tokens).then(|| end(kept.len(), FinishReason::Length)),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends() {
        let rule = StopRule::new([1], vec![vec![7, 8], vec![]]);
        let stop = |tokens, text_tokens| Some(End { tokens, text_tokens, reason: FinishReason::Stop });
        let length = |tokens| Some(End { tokens, text_tokens: tokens, reason: FinishReason::Length });
        let cases: [(&[u32], usize, usize, Option<End>); 9] = [
            (&[5, 6], 0, 3, None),
            (&[5, 6, 9], 0, 3, length(3)),
            (&[5, 1, 9], 0, 3, stop(2, 1)),    // tokens past the end are dropped
            (&[1], 0, 1, stop(1, 0)),          // a stop at the budget is a stop
            (&[5, 7, 8, 9], 1, 9, stop(3, 1)), // the whole sequence leaves the text
            (&[7, 8], 1, 9, stop(2, 0)),       // a sequence that began before `from` (an earlier call)
            (&[8], 0, 9, None),                // half a sequence is none
            (&[7, 7, 8], 0, 2, length(2)),     // the budget ends before the sequence is complete
            (&[5, 6, 9, 9], 0, 3, length(3)),
        ];
        for (sampled, from, budget, expected) in cases {
            assert_eq!(rule.end(sampled, from, budget), expected, "{sampled:?} from {from} budget {budget}");
        }
        assert_eq!(StopRule::default().end(&[1, 2], 0, 9), None);
    }
}
