//! Lists of patterns with `**` and `!`, as in `.dockerignore`, and the filter of a tree walk (rows
//! `cb.filesync.md`, `df.ignore*`).

use shipway_fault::{Fault, Result};
use shipway_gocompat::{BadPattern, Glob, path::clean};

/// One pattern of a list.
#[derive(Clone, Debug)]
pub struct Pattern {
    text: String,
    negated: bool,
    /// Index in the list that was given, before empty patterns were dropped.
    index: usize,
    form: Form,
}

#[derive(Clone, Debug)]
enum Form {
    Exact,
    /// The text, less a final `**`, begins the path.
    Prefix,
    /// The text, less its first `**`, ends the path.
    Suffix,
    Glob(Glob),
}

impl Pattern {
    fn new(text: String, negated: bool, index: usize) -> Result<Self> {
        let body = text.strip_prefix("**").unwrap_or(&text);
        let plain = |t: &str| !t.contains(['*', '?', '[', ']', '\\']);
        // The forms are not only faster: `**x` as a suffix matches `ax`, which the general form
        // would not.
        let form = if plain(&text) {
            Form::Exact
        } else if text.starts_with("**") && plain(body) {
            Form::Suffix
        } else if text.strip_suffix("**").is_some_and(plain) {
            Form::Prefix
        } else {
            Form::Glob(Glob::with_double_star(&text).map_err(|e| malformed(&text, e))?)
        };
        Ok(Self { text, negated, index, form })
    }

    /// Whether it takes back what earlier patterns matched.
    pub fn is_negated(&self) -> bool {
        self.negated
    }

    /// The cleaned pattern, without its `!`.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Its place in the list it was given in.
    pub fn index(&self) -> usize {
        self.index
    }

    fn matches(&self, path: &str) -> bool {
        match &self.form {
            Form::Exact => path == self.text,
            Form::Prefix => path.starts_with(&self.text[..self.text.len() - 2]),
            Form::Suffix => {
                let suffix = &self.text[2..];
                path.ends_with(suffix) || suffix.strip_prefix('/') == Some(path)
            }
            Form::Glob(glob) => glob.matches(path),
        }
    }

    fn matches_or_parent(&self, path: &str) -> bool {
        match &self.form {
            Form::Glob(glob) => glob.matches_or_parent(path),
            _ => {
                self.matches(path) || path.match_indices('/').any(|(i, _)| self.matches(&path[..i]))
            }
        }
    }

    /// The part of the text that nothing below can vary, if the rest is only a final `/*` or `/**`.
    fn stem(&self) -> Option<&str> {
        let stem = self.text.strip_suffix("/**").unwrap_or(&self.text);
        let stem = stem.strip_suffix("/*").unwrap_or(stem);
        (!stem.contains(['*', '[', ']', '?', '^', '\\'])).then_some(stem)
    }
}

fn malformed(pattern: &str, error: BadPattern) -> Fault {
    Fault::invalid(format!("{error} {pattern:?}"))
        .hint("a pattern ends with a lone backslash or has an unclosed or empty [class]")
}

/// A list of patterns, of which the last that matches decides.
#[derive(Clone, Debug, Default)]
pub struct PatternMatcher {
    patterns: Vec<Pattern>,
}

/// Which patterns matched a directory; [`Default`] for "nothing known", as at the root.
#[derive(Clone, Debug, Default)]
pub struct MatchInfo(Vec<bool>);

impl PatternMatcher {
    /// Compiles `patterns`; empty ones are dropped.
    pub fn new<S: AsRef<str>>(patterns: impl IntoIterator<Item = S>) -> Result<Self> {
        let mut compiled = Vec::new();
        for (index, pattern) in patterns.into_iter().enumerate() {
            let trimmed = pattern.as_ref().trim();
            if trimmed.is_empty() {
                continue;
            }
            let cleaned = clean(trimmed);
            let (negated, text) = match cleaned.strip_prefix('!') {
                Some("") => return Err(Fault::invalid("illegal exclusion pattern: \"!\"")),
                Some(rest) => (true, rest.to_owned()),
                None => (false, cleaned),
            };
            compiled.push(Pattern::new(text, negated, index)?);
        }
        Ok(Self { patterns: compiled })
    }

    /// The patterns in effect.
    pub fn patterns(&self) -> &[Pattern] {
        &self.patterns
    }

    /// Whether `path`, or a directory above it, matches.
    pub fn matches(&self, path: &str) -> bool {
        self.decider(path).is_some_and(|p| !p.negated)
    }

    /// The pattern that decides about `path`: the last that changed the outcome, if any matched.
    pub fn decider(&self, path: &str) -> Option<&Pattern> {
        let mut decider: Option<&Pattern> = None;
        for pattern in &self.patterns {
            let matched = decider.is_some_and(|p| !p.negated);
            if pattern.negated == matched && pattern.matches_or_parent(path) {
                decider = Some(pattern);
            }
        }
        decider
    }

    /// Like [`PatternMatcher::matches`] during a walk, with what is known of the parent directory;
    /// the second value is for the children.
    pub fn matches_below(&self, path: &str, parent: &MatchInfo) -> (bool, MatchInfo) {
        let known = parent.0.len() == self.patterns.len();
        let mut matched = false;
        let mut info = MatchInfo(vec![false; self.patterns.len()]);
        for (i, pattern) in self.patterns.iter().enumerate() {
            let mut hit = known && parent.0[i];
            if !hit {
                if pattern.negated != matched {
                    continue;
                }
                hit = if known { pattern.matches(path) } else { pattern.matches_or_parent(path) };
            }
            info.0[i] = hit;
            if hit {
                matched = !pattern.negated;
            }
        }
        (matched, info)
    }
}

/// Whether a walk keeps an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It belongs to the result.
    Keep,
    /// It does not, but entries below it may.
    Pass,
    /// Neither it nor anything below it does.
    Prune,
}

/// What a filter knows of a directory, for judging what is in it; [`Default`] for the root.
#[derive(Clone, Debug, Default)]
pub struct DirMatch {
    include: MatchInfo,
    exclude: MatchInfo,
}

/// Include and exclude patterns together: a path must match the first, if there are any, and must
/// not match the second.
#[derive(Clone, Debug, Default)]
pub struct PathFilter {
    include: Option<PatternMatcher>,
    exclude: Option<PatternMatcher>,
    /// Whether every including pattern is a plain path, so that directories can be ruled out.
    plain_includes: bool,
    /// The same of the exceptions to the exclusions.
    plain_exceptions: bool,
}

impl PathFilter {
    /// A filter of these patterns; empty lists let everything through.
    pub fn new<S: AsRef<str>>(include: &[S], exclude: &[S]) -> Result<Self> {
        let compile = |what: &str, patterns: &[S]| -> Result<Option<PatternMatcher>> {
            if patterns.is_empty() {
                return Ok(None);
            }
            PatternMatcher::new(patterns)
                .map(Some)
                .map_err(|e| e.context(format!("invalid {what}")))
        };
        let include = compile("includepatterns", include)?;
        let exclude = compile("excludepatterns", exclude)?;
        let plain = |m: &Option<PatternMatcher>, negated| {
            m.iter().flat_map(|m| &m.patterns).all(|p| p.negated != negated || p.stem().is_some())
        };
        Ok(Self {
            plain_includes: plain(&include, false),
            plain_exceptions: plain(&exclude, true),
            include,
            exclude,
        })
    }

    /// Whether everything passes.
    pub fn is_empty(&self) -> bool {
        self.include.is_none() && self.exclude.is_none()
    }

    /// Whether `path` passes, judged alone.
    pub fn keeps(&self, path: &str) -> bool {
        self.include.as_ref().is_none_or(|m| m.matches(path))
            && !self.exclude.as_ref().is_some_and(|m| m.matches(path))
    }

    /// Judges `path` during a walk, given its directory's [`DirMatch`].
    pub fn visit(&self, path: &str, is_dir: bool, parent: &DirMatch) -> (Verdict, DirMatch) {
        let mut verdict = Verdict::Keep;
        let mut state = DirMatch::default();
        if let Some(matcher) = &self.include {
            let (matched, info) = matcher.matches_below(path, &parent.include);
            state.include = info;
            if !matched {
                if is_dir && self.plain_includes && !leads_on(matcher, false, path) {
                    return (Verdict::Prune, state);
                }
                verdict = Verdict::Pass;
            }
        }
        if let Some(matcher) = &self.exclude {
            let (matched, info) = matcher.matches_below(path, &parent.exclude);
            state.exclude = info;
            if matched {
                if is_dir && self.plain_exceptions && !leads_on(matcher, true, path) {
                    return (Verdict::Prune, state);
                }
                verdict = Verdict::Pass;
            }
        }
        (verdict, state)
    }
}

/// Whether some (negated or plain) pattern of `matcher` names something below the directory `path`.
fn leads_on(matcher: &PatternMatcher, negated: bool, path: &str) -> bool {
    matcher.patterns.iter().filter(|p| p.negated == negated).any(|p| {
        p.stem().is_some_and(|stem| {
            stem.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(patterns: &[&str], path: &str, expected: bool) {
        let matcher = PatternMatcher::new(patterns).expect("valid patterns");
        assert_eq!(matcher.matches(path), expected, "{patterns:?} {path}");
    }

    #[test]
    fn patterns_match_as_dockerignore_does() {
        for (pattern, path, expected) in [
            ("**", "file", true),
            ("**", "dir/file", true),
            ("**/", "file", true),
            ("**/**", "dir/file", true),
            ("dir/**", "dir/file", true),
            ("dir/**", "dir", false),
            ("dir/**", "dir/dir2/file", true),
            ("**/dir", "dir", true),
            ("**/dir", "dir/file", true),
            ("**/dir2/*", "dir/dir2/file", true),
            ("**/dir2/**", "dir/dir2/dir2/file", true),
            ("**file", "file", true),
            ("**file", "afile", true),
            ("**/file", "afile", false),
            ("**file*", "afile", false),
            ("**/*.txt", "a.txt", true),
            ("a/**/b", "a/b", true),
            ("a/**/b", "a/x/y/b", true),
            ("a/**/b", "a/xb", false),
            ("a**b", "ab", true),
            ("a**/b", "ax/b", true),
            ("foo*/bar", "foox/bar", true),
            ("foo*/bar", "foo/x/bar", false),
            ("*", "a/b", true),
            ("*.go", "a/b.go", false),
            ("a?c", "abc", true),
            ("a?c", "a/c", false),
            ("[ab]c", "bc", true),
            ("[^ab]c", "bc", false),
            ("[a-c]x", "bx", true),
            ("\\*", "*", true),
            ("\\*", "a", false),
            ("a.b", "axb", false),
            ("a+(b)|{c}$", "a+(b)|{c}$", true),
            ("./a/../b", "b", true),
            ("dir", "dir/a/b", true),
            ("é*", "éa", true),
        ] {
            check(&[pattern], path, expected);
        }
        check(&["a", "!a/b"], "a/b", false);
        check(&["a", "!a/b"], "a/c", true);
        check(&["a", "!a/b", "a/b/c"], "a/b/c", true);
        check(&["!a", "a"], "a", true);
        check(&["**", "!x.md"], "x.md", false);
        check(&["", "  "], "x", false);
    }

    #[test]
    fn bad_patterns_are_refused() {
        for pattern in ["[", "[]", "[a", "a\\", "[-]", "[a-]", "!", "[]a]"] {
            assert!(PatternMatcher::new([pattern]).is_err(), "{pattern}");
        }
    }

    #[test]
    fn a_pattern_made_to_backtrack_is_fast() {
        let pattern = "**/a*".repeat(50) + "b";
        check(&[&pattern], &"a/".repeat(500), false);
    }

    #[test]
    fn walking_agrees_with_judging_alone() {
        let paths = [
            "a",
            "a/b",
            "a/b/c",
            "a/b/c/d.go",
            "a/x.md",
            "b",
            "b/x.md",
            "c",
            "c/vendor",
            "c/vendor/x",
        ];
        let lists: &[(&[&str], &[&str])] = &[
            (&["a/b/c"], &[]),
            (&["**/*.md"], &["a"]),
            (&[], &["a", "!a/b/c"]),
            (&[], &["**/vendor", "!c/vendor/x"]),
            (&["a/b/**", "!a/b/c/d.go"], &[]),
            (&["a/*"], &["**/*.go"]),
            (&[], &["*", "!a/x.md"]),
        ];
        for (include, exclude) in lists {
            let filter = PathFilter::new(include, exclude).expect("valid");
            let mut states = std::collections::HashMap::from([(
                String::new(),
                (Verdict::Pass, DirMatch::default()),
            )]);
            for path in paths {
                let (dir, _) = crate::path::split(path);
                let (above, parent) = states[dir].clone();
                let is_dir = paths.iter().any(|p| p.starts_with(&format!("{path}/")));
                let judged = if above == Verdict::Prune {
                    (Verdict::Prune, parent)
                } else {
                    filter.visit(path, is_dir, &parent)
                };
                assert_eq!(
                    judged.0 == Verdict::Keep,
                    filter.keeps(path),
                    "{include:?} {exclude:?} {path}"
                );
                states.insert(path.to_owned(), judged);
            }
        }
    }

    #[test]
    fn hopeless_directories_are_pruned() {
        let filter = PathFilter::new(&["a/b"], &[]).expect("valid");
        assert_eq!(filter.visit("a", true, &DirMatch::default()).0, Verdict::Pass);
        assert_eq!(filter.visit("b", true, &DirMatch::default()).0, Verdict::Prune);
        let filter = PathFilter::new::<&str>(&[], &["node_modules", "!other/x"]).expect("valid");
        assert_eq!(filter.visit("node_modules", true, &DirMatch::default()).0, Verdict::Prune);
    }
}
