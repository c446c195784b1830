//! The text of an answer as it may be shown: cut at a stop sequence, and held back where one may be beginning.

/// Looks for stop sequences in text that comes in pieces. Whatever the pieces are, what is shown in all is the text before the
/// first place where a sequence ends.
#[derive(Debug)]
pub struct Stops {
    sequences: Vec<String>,
    /// What was not shown yet: the beginning of a sequence, maybe.
    held: String,
}

impl Stops {
    /// Of these sequences; an empty one never matches.
    pub fn new(mut sequences: Vec<String>) -> Self {
        sequences.retain(|sequence| !sequence.is_empty());
        Self { sequences, held: String::new() }
    }

    /// The text that may be shown now that `text` has come, and whether it ends here, at a sequence, which is left out.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        let ends = |sequence: &String| self.held.find(sequence.as_str()).map(|at| (at + sequence.len(), at));
        // The one that is complete first; of those that are complete at the same place, the longest.
        if let Some((_, at)) = self.sequences.iter().filter_map(ends).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let begins = |at: &usize| self.sequences.iter().any(|sequence| sequence.starts_with(&self.held[*at..]));
        let from = self.held.char_indices().map(|(at, _)| at).find(begins).unwrap_or(self.held.len());
        let rest = self.held.split_off(from);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// The text that was held back when no more comes.
    pub fn finish(self) -> String {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The text before the first place where a sequence is complete.
    fn cut(text: &str, sequences: &[String]) -> (String, bool) {
        for end in 1..=text.len() {
            let longest =
                sequences.iter().filter(|s| !s.is_empty() && text[..end].ends_with(s.as_str())).map(String::len).max();
            if let Some(length) = longest {
                return (text[..end - length].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            pieces in prop::collection::vec("[abc]{0,4}", 0..8),
            sequences in prop::collection::vec("[abc]{0,3}", 0..4),
        ) {
            let mut stops = Stops::new(sequences.clone());
            let (mut shown, mut stopped) = (String::new(), false);
            for piece in &pieces {
                let (text, ends) = stops.push(piece);
                shown.push_str(&text);
                if ends {
                    stopped = true;
                    break;
                }
            }
            if !stopped {
                shown.push_str(&stops.finish());
            }
            prop_assert_eq!((shown, stopped), cut(&pieces.concat(), &sequences));
        }
    }

    #[test]
    fn characters_are_not_cut() {
        let mut stops = Stops::new(vec!["é!".into()]);
        assert_eq!(stops.push("caf"), ("caf".into(), false));
        assert_eq!(stops.push("é"), (String::new(), false));
        assert_eq!(stops.push("?"), ("é?".into(), false));
        assert_eq!(stops.push("é!x"), (String::new(), true));
    }
}
