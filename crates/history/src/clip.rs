//! How much of what a client said is remembered: a request may be as large as a message, and
//! hundreds of builds are.

use std::collections::BTreeMap;

/// Most bytes of one text; more is cut off, and says so.
pub(super) const MAX_VALUE: usize = 64 << 10;
/// Most bytes of all texts of a record together.
pub(super) const MAX_TEXT: usize = 1 << 20;
/// What an entry of a map costs besides its bytes.
const ENTRY: usize = 64;

/// What may still be remembered of a record's texts.
pub(super) struct Budget(usize);

impl Default for Budget {
    fn default() -> Self {
        Self(MAX_TEXT)
    }
}

impl Budget {
    /// `text`, or as much of it as there is room for.
    pub(super) fn text(&mut self, text: &str) -> String {
        let kept = clipped(text, MAX_VALUE.min(self.0));
        self.0 = self.0.saturating_sub(kept.len() + ENTRY);
        kept
    }

    /// The entries that there is room for. Short ones come first: they say more than a part of a
    /// long one.
    pub(super) fn map(&mut self, map: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let mut entries: Vec<_> = map.iter().filter(|(key, _)| key.len() <= MAX_VALUE).collect();
        entries.sort_by_key(|(key, value)| key.len() + value.len());
        let mut kept = BTreeMap::new();
        for (key, value) in entries {
            let Some(left) = self.0.checked_sub(key.len() + ENTRY) else { break };
            self.0 = left;
            kept.insert(key.clone(), self.text(value));
        }
        kept
    }
}

/// `text`, or its first `most` bytes and a note of how many there were.
pub(super) fn clipped(text: &str, most: usize) -> String {
    if text.len() <= most {
        return text.to_owned();
    }
    let end = (0..=most).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
    format!("{}… ({} bytes)", &text[..end], text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_values_are_cut_and_all_together_are_bounded() {
        let mut map: BTreeMap<String, String> =
            (0..100).map(|i| (format!("long-{i}"), "ü".repeat(MAX_VALUE))).collect();
        map.insert("short".into(), "x".into());
        map.insert("k".repeat(MAX_VALUE + 1), "y".into());
        let kept = Budget::default().map(&map);
        assert_eq!(kept["short"], "x");
        assert!(kept["long-0"].ends_with(&format!("… ({} bytes)", 2 * MAX_VALUE)));
        let size: usize = kept.iter().map(|(k, v)| k.len() + v.len()).sum();
        assert!(size > MAX_TEXT / 2 && size < MAX_TEXT + 64 * kept.len(), "{size}");
        let many: BTreeMap<String, String> =
            (0..1_000_000).map(|i| (i.to_string(), String::new())).collect();
        assert!(Budget::default().map(&many).len() < 2 * MAX_TEXT / ENTRY);
    }
}
