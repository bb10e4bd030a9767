//! Metrics in Prometheus's text format (version 0.0.4).
//!
//! The format is written here. What there is to say is counted where it happens; a library of
//! metrics wants to own its counters, so each would be counted twice or copied at each scrape. The
//! format itself is some lines of escaping.

use std::fmt::Write as _;

/// Content type of a page.
pub const FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A page of metrics as it grows.
#[derive(Debug)]
pub struct Page {
    text: String,
    prefix: &'static str,
}

/// What a metric is.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

impl Page {
    /// A page without metrics, whose names will all begin with `prefix`.
    pub fn new(prefix: &'static str) -> Self {
        Self { text: String::new(), prefix }
    }

    /// Lets the names of further metrics begin with `prefix`.
    pub fn prefix(&mut self, prefix: &'static str) {
        self.prefix = prefix;
    }

    /// Begins a metric; its samples follow.
    pub fn metric(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let prefix = self.prefix;
        let _ = writeln!(self.text, "# HELP {prefix}{name} {help}\n# TYPE {prefix}{name} {kind}");
    }

    /// A sample of the metric that was begun last.
    pub fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let _ = write!(self.text, "{}{name}", self.prefix);
        for (n, (label, text)) in labels.iter().enumerate() {
            let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.text, "{}{label}=\"{text}\"", if n == 0 { '{' } else { ',' });
        }
        let _ = writeln!(self.text, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    /// A metric of one sample.
    pub fn one(&mut self, name: &str, kind: Kind, help: &str, value: f64) {
        self.metric(name, kind, help);
        self.sample(name, &[], value);
    }

    /// The samples of a histogram: how many were at most each bound (those below it included), how
    /// many there were, and their sum.
    pub fn histogram(
        &mut self,
        name: &str,
        labels: &[(&str, &str)],
        buckets: &[(f64, u64)],
        count: u64,
        sum: f64,
    ) {
        let bounds = buckets.iter().map(|(bound, count)| (bound.to_string(), *count));
        for (bound, count) in bounds.chain([("+Inf".to_owned(), count)]) {
            let labels: Vec<_> = labels.iter().copied().chain([("le", &*bound)]).collect();
            self.sample(&format!("{name}_bucket"), &labels, count as f64);
        }
        self.sample(&format!("{name}_sum"), labels, sum);
        self.sample(&format!("{name}_count"), labels, count as f64);
    }

    /// All of it.
    pub fn text(self) -> String {
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_the_text_that_scrapers_read() {
        let mut page = Page::new("p_");
        page.metric("a", Kind::Gauge, "Help.");
        page.sample("a", &[("x", "q\"\\\n"), ("y", "1")], 0.5);
        page.metric("h", Kind::Histogram, "Times.");
        page.histogram("h", &[("m", "n")], &[(0.1, 1), (2.0, 3)], 4, 9.0);
        page.prefix("");
        page.one("c_total", Kind::Counter, "Count.", 7.0);
        let expected = r#"# HELP p_a Help.
# TYPE p_a gauge
p_a{x="q\"\\\n",y="1"} 0.5
# HELP p_h Times.
# TYPE p_h histogram
p_h_bucket{m="n",le="0.1"} 1
p_h_bucket{m="n",le="2"} 3
p_h_bucket{m="n",le="+Inf"} 4
p_h_sum{m="n"} 9
p_h_count{m="n"} 4
# HELP c_total Count.
# TYPE c_total counter
c_total 7
"#;
        assert_eq!(page.text(), expected);
    }
}
